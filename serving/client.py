"""Asks a model server to classify images: TF Serving, or the one in `serving/server`.

`python -m serving.client --server localhost:8500 cat.jpg photos/`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.images import RESIZE, RESIZES, Resize
from serving import tensors
from serving.connection import Connection, Tls
from serving.encoding import BYTES, IMAGES, INPUTS, encode
from serving.images import ServingError, classify_batch, find_images, load_batches
from serving.printing import lines, run
from serving.protos import get_model_metadata_pb2, get_model_status_pb2, predict_pb2

DEFAULT_MODEL = "cifar100_vit"
_BATCH_SIZE = 32
# A gRPC server refuses messages of more than 4 MB unless it is told otherwise.
_BATCH_BYTES = 3 << 20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of a signature: NumPy's name of its type, and its shape (None: any)."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Signature:
    """The tensors of a signature, by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Version:
    """A version of the model: `state` is AVAILABLE when it answers; `error` says why it is not."""

    version: int
    state: str
    error: str


class Client:
    """A model on a model server.

    Args:
      server: HOST:PORT of its gRPC API.
      model: The model's name on the server.
      version: Which version to ask; the newest without it.
      label: Which version to ask, by a label of the server's configuration.
      tls: How to encrypt; None for an unencrypted connection.
      timeout: Seconds that a request may take, retries included.

    Raises:
      ServingError: A certificate cannot be read.
    """

    def __init__(
        self,
        server: str,
        model: str = DEFAULT_MODEL,
        *,
        version: int | None = None,
        label: str | None = None,
        tls: Tls | None = None,
        timeout: float = 30.0,
    ):
        self._model, self._version, self._label = model, version, label
        self._timeout = timeout
        self._connection = Connection(server, tls)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def request(self, inputs: Mapping[str, Any], signature: str = IMAGES) -> Any:
        """Makes the PredictRequest that `predict` sends, with the same arguments."""
        request = predict_pb2.PredictRequest()
        self._address(request.model_spec)
        request.model_spec.signature_name = signature
        for name, values in inputs.items():
            request.inputs[name].CopyFrom(tensors.to_proto(values))
        return request

    def predict(self, inputs: Mapping[str, Any], signature: str = IMAGES) -> dict[str, np.ndarray]:
        """Calls a signature.

        Args:
          inputs: Name -> array, or what makes one; of bytes for a string tensor.
          signature: The signature's name.

        Returns:
          Its outputs by name; strings as bytes.

        Raises:
          ServerError: The server cannot be reached, or refuses.
        """
        response = self._connection.call(
            self._connection.prediction.Predict, self.request(inputs, signature), self._timeout
        )
        return {name: tensors.to_array(proto) for name, proto in response.outputs.items()}

    def classify(
        self,
        paths: Sequence[str | Path],
        *,
        signature: str = BYTES,
        batch_size: int = _BATCH_SIZE,
        resize: Resize = RESIZE,
    ) -> Iterator[dict[str, Any]]:
        """Classifies image files, which are decoded and resized here.

        Args:
          paths: Files of any size and of a format that `dataset.images` reads, and folders that
            are searched for such files.
          signature: Which one to ask; the answers are the same.
          batch_size: Images in a request, at most.
          resize: How the model was trained to see images of other sizes; its card says it, which
            servers do not tell.

        Yields:
          For each image its `image` (path) and `classes`: five objects of `name`, `superclass`,
          `id` and `probability`, the most probable first. For a file that is none its `image` and
          `error`, the reason.

        Raises:
          ServingError: A path does not exist, or the model takes no images.
          ServerError: The server cannot be reached, or refuses.
        """
        if signature not in INPUTS:
            raise ServingError(
                f"images cannot be sent to a signature {signature!r}: use {', '.join(INPUTS)}."
            )
        files = find_images([Path(path) for path in paths])
        height, width = self.image_size()
        batch_size = min(batch_size, max(1, _BATCH_BYTES // (3 * height * width)))

        def predict(images: list[np.ndarray]) -> dict[str, np.ndarray]:
            return self.predict({INPUTS[signature]: encode(images, signature)}, signature)

        for batch in load_batches(files, (height, width), batch_size, resize):
            yield from classify_batch(batch, predict)

    def image_size(self) -> tuple[int, int]:
        """Asks for the height and width of the images that the model takes.

        Raises:
          ServingError: It takes none.
          ServerError: The server cannot be reached, or does not know the model.
        """
        signature = self.metadata()[1].get(IMAGES)
        images = signature and signature.inputs.get(INPUTS[IMAGES])
        if images and len(images.shape) == 4:
            _, height, width, _ = images.shape
            if height and width:
                return height, width
        raise ServingError(
            f"{self._model} has no signature {IMAGES!r} of images: it is not a model of this "
            "pipeline."
        )

    def status(self) -> list[Version]:
        """Lists the versions that the server knows, or the one that this client asks.

        Raises:
          ServerError: The server cannot be reached, or does not know the model.
        """
        request = get_model_status_pb2.GetModelStatusRequest()
        self._address(request.model_spec)
        response = self._connection.call(
            self._connection.model.GetModelStatus, request, self._timeout
        )
        states = get_model_status_pb2.ModelVersionStatus.State
        return [
            Version(item.version, states.Name(item.state), item.status.error_message)
            for item in response.model_version_status
        ]

    def metadata(self) -> tuple[int, dict[str, Signature]]:
        """Describes the model.

        Returns:
          (version, signatures by name).

        Raises:
          ServerError: The server cannot be reached, or does not know the model.
        """
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        self._address(request.model_spec)
        response = self._connection.call(
            self._connection.prediction.GetModelMetadata, request, self._timeout
        )
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return response.model_spec.version.value, {
            name: Signature(_tensors(definition.inputs), _tensors(definition.outputs))
            for name, definition in sorted(signatures.signature_def.items())
            if definition.outputs  # the others are of SavedModel's own
        }

    def _address(self, spec: Any) -> None:
        spec.name = self._model
        if self._version is not None:
            spec.version.value = self._version
        elif self._label is not None:
            spec.version_label = self._label


def _tensors(infos: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: Tensor(
            tensors.type_name(info.dtype),
            tuple(dim.size if dim.size >= 0 else None for dim in info.tensor_shape.dim),
        )
        for name, info in sorted(infos.items())
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Classifies the files of a command line, or describes the model.

    Raises:
      SystemExit: See `serving.printing.run`.
    """
    # Failed handshakes are in our messages.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    options = _parser().parse_args(arguments)
    if not (options.images or options.status or options.metadata):
        _parser().error("give images to classify, --status or --metadata")
    run(_lines(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vit-client", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="file or folder")
    parser.add_argument("--server", default="localhost:8500", metavar="HOST:PORT")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    version = parser.add_mutually_exclusive_group()
    version.add_argument("--version", type=int, help="version to ask; default: the newest")
    version.add_argument("--label", help="version to ask by a label, such as stable or canary")
    parser.add_argument(
        "--signature", default=BYTES, choices=list(INPUTS), help="default: %(default)s"
    )
    parser.add_argument(
        "--resize",
        default=RESIZE,
        choices=RESIZES,
        help="what the model was trained with (see its assets.extra/dataset.json); "
        "default: %(default)s",
    )
    parser.add_argument("--batch_size", type=_positive, default=_BATCH_SIZE, metavar="N")
    parser.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="S", help="of a request with its retries"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, an object for each line")
    parser.add_argument("--status", action="store_true", help="list the model's versions")
    parser.add_argument("--metadata", action="store_true", help="list the model's signatures")
    parser.add_argument("--tls", action="store_true", help="encrypt; implied by the following")
    parser.add_argument("--ca", type=Path, metavar="PEM", help="authorities to trust")
    parser.add_argument("--cert", type=Path, metavar="PEM", help="this client's certificate")
    parser.add_argument("--key", type=Path, metavar="PEM", help="its private key")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def _seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return float(text)


def _lines(options: argparse.Namespace) -> Iterator[str]:
    tls = Tls(options.ca, options.cert, options.key)
    encrypted = options.tls or tls != Tls()
    with Client(
        options.server,
        options.model,
        version=options.version,
        label=options.label,
        tls=tls if encrypted else None,
        timeout=options.timeout,
    ) as client:
        if options.status:
            yield from _status_lines(client, options.json)
        if options.metadata:
            yield from _metadata_lines(client, options.json)
        if options.images:
            results = client.classify(
                options.images,
                signature=options.signature,
                batch_size=options.batch_size,
                resize=options.resize,
            )
            yield from lines(results, options.json)


def _status_lines(client: Client, as_json: bool) -> Iterator[str]:
    for version in client.status():
        text = f"version {version.version}  {version.state}  {version.error}".rstrip()
        yield json.dumps(dataclasses.asdict(version)) if as_json else text


def _metadata_lines(client: Client, as_json: bool) -> Iterator[str]:
    number, signatures = client.metadata()
    if as_json:
        described = {name: dataclasses.asdict(s) for name, s in signatures.items()}
        yield json.dumps({"version": number, "signatures": described})
        return
    yield f"version {number}"
    for name, signature in signatures.items():
        yield f"  {name}"
        yield from _tensor_lines("takes", signature.inputs)
        yield from _tensor_lines("gives", signature.outputs)


def _tensor_lines(verb: str, described: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in described.items():
        shape = ", ".join("N" if size is None else str(size) for size in tensor.shape)
        yield f"    {verb} {name}: {tensor.dtype} [{shape}]"


if __name__ == "__main__":
    main()
