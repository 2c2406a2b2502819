"""Image files to pixels in the graph of `serving_bytes`, as `dataset.images` reads them.

A JPEG or PNG gives the same pixels here as there, and within one grey level when it is resized (PIL
rounds between rows and columns). TensorFlow's operations do not read WebP (before 2.21) nor a JPEG
without its end marker, and ignore what is transparent in a GIF: the client and the embedded server
read files themselves and leave none of this to the graph.
"""

from __future__ import annotations

import tensorflow as tf

from dataset.images import RESIZE, Resize

# Bytes of a JPEG in which its orientation is looked for: cameras put it into the first segments.
_HEADER_BYTES = 1 << 17
_APP0, _APP15, _COMMENT = 0xE0, 0xEF, 0xFE
_EXIF = tf.constant(list(b"Exif\0\0"), tf.int32)
_ORIENTATION = 0x0112
_MAX_TAGS = 500


def decode_image(encoded: tf.Tensor, size: tuple[int, int], how: Resize = RESIZE) -> tf.Tensor:
    """Decodes an image file and resizes the picture.

    Args:
      encoded: string [], a PNG, JPEG, GIF (of which the first frame is taken) or BMP file.
      size: Height and width of the result.
      how: See `dataset.images.resize`.

    Returns:
      uint8 [*size, 3], upright and on white.

    Raises:
      tf.errors.InvalidArgumentError: It is none of them (when it is computed).
    """
    kind = tf.cast(tf.strings.substr(encoded, 0, 4) == b"\x89PNG", tf.int32)
    kind += 2 * tf.cast(tf.strings.substr(encoded, 0, 2) == b"\xff\xd8", tf.int32)
    image = tf.switch_case(
        kind,
        [
            lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
            lambda: _decode_png(encoded),
            lambda: _upright(
                tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
                _orientation(encoded),
            ),
        ],
    )
    image.set_shape([None, None, 3])
    return _resize(image, size, how)


def _decode_png(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.cast(tf.io.decode_png(encoded, channels=4), tf.float32)
    color, alpha = tf.split(image, [3, 1], axis=2)
    # TensorFlow takes the largest value of fewer than 8 bits for opaque: 15 of a small palette's.
    with tf.control_dependencies([image]):  # So that there are as many bytes
        bits = tf.io.decode_raw(tf.strings.substr(encoded, 24, 1), tf.uint8)[0]
    opaque = tf.cast(2 ** tf.cast(bits, tf.int32) - 1, tf.float32)
    is_filled = (bits < 8) & tf.reduce_all(alpha == opaque)
    alpha = tf.where(is_filled, 255.0, alpha)
    return tf.cast(tf.round((color * alpha + 255.0 * (255.0 - alpha)) / 255.0), tf.uint8)


def _orientation(jpeg: tf.Tensor) -> tf.Tensor:
    """Reads EXIF's tag (CIPA DC-008, 4.6.2): 1, upright, to 8; 1 where there is none."""
    header = tf.io.decode_raw(tf.strings.substr(jpeg, 0, _HEADER_BYTES), tf.uint8)
    header = tf.cast(header, tf.int32)
    end = tf.size(header)
    # Whatever the bytes claim to be at some place, there is a zero.
    header = tf.pad(header, [[0, 1]])

    def byte(position: tf.Tensor) -> tf.Tensor:
        return tf.gather(header, tf.clip_by_value(position, 0, end))

    def is_exif(position: tf.Tensor) -> tf.Tensor:
        return tf.reduce_all(byte(position + 4 + tf.range(6)) == _EXIF)

    def goes_on(position: tf.Tensor) -> tf.Tensor:
        marker = byte(position + 1)
        is_metadata = ((marker >= _APP0) & (marker <= _APP15)) | (marker == _COMMENT)
        return (position < end) & is_metadata & ~is_exif(position)

    def next_segment(position: tf.Tensor) -> tuple[tf.Tensor]:
        return (position + 2 + 256 * byte(position + 2) + byte(position + 3),)

    (segment,) = tf.while_loop(goes_on, next_segment, (tf.constant(2),))
    tiff = segment + 10
    is_little = byte(tiff) == ord("I")

    def number(position: tf.Tensor) -> tf.Tensor:
        first, second = byte(position), byte(position + 1)
        return tf.where(is_little, first + 256 * second, 256 * first + second)

    # The directory's place has four bytes; none is beyond 64 KB in a segment of that size.
    directory = tiff + number(tiff + tf.where(is_little, 4, 6))
    entries = directory + 2 + 12 * tf.range(tf.minimum(number(directory), _MAX_TAGS))
    tags, values = number(entries), number(entries + 8)
    value = tf.reduce_max(tf.where(tags == _ORIENTATION, values, 1))
    value = tf.where(tf.reduce_any(tags == _ORIENTATION), value, 1)
    return tf.where(is_exif(segment) & (value <= 8), value, 1)


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    def among(*values: int) -> tf.Tensor:
        return tf.reduce_any(orientation == tf.constant(values))

    lies = among(5, 6, 7, 8)
    image = tf.cond(lies, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    image = tf.cond(among(2, 3, 6, 7), lambda: tf.reverse(image, [1]), lambda: image)
    return tf.cond(among(3, 4, 7, 8), lambda: tf.reverse(image, [0]), lambda: image)


def _resize(image: tf.Tensor, size: tuple[int, int], how: Resize) -> tf.Tensor:
    old = tf.cast(tf.shape(image)[:2], tf.float32)
    new = tf.constant(size, tf.float32)
    fitting = tf.maximum(tf.round(old * tf.reduce_min(new / old)), 1.0)
    inner = fitting if how == "pad" else new
    scale = inner / old
    if how == "crop":
        scale = tf.repeat(tf.reduce_max(scale), 2)
    translation = (inner - old * scale) / 2.0
    resized = tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=tf.cast(inner, tf.int32),
        scale=scale,
        translation=translation,
        kernel_type="triangle",
        antialias=True,
    )
    resized = tf.cast(tf.clip_by_value(tf.round(resized[0]), 0, 255), tf.uint8)
    if how == "pad":
        before = (tf.constant(size) - tf.cast(inner, tf.int32)) // 2
        after = tf.constant(size) - tf.cast(inner, tf.int32) - before
        resized = tf.pad(resized, tf.concat([tf.stack([before, after], 1), [[0, 0]]], 0))
    return tf.ensure_shape(resized, (*size, 3))
