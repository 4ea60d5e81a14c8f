"""Packaging: what is installed, what it needs, and the `fusiontrain` command. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fusiontrain" / "__init__.py").read_text()).group(1)
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml"))
LAUNCHERS = ["launch/env.sh", "launch/slurm.sbatch", "launch/torchrun.sh"]

setup(
    name="fusiontrain",
    version=VERSION,
    description="Distributed pretraining of models that read and write text and images in one sequence",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels/` itself must not become a package: it would shadow the one of that name that transformers looks for.
    packages=[*find_packages(include=["fusiontrain", "fusiontrain.*"]), *find_packages("kernels", include=["fusiontrain_kernels", "fusiontrain_kernels.*"])],
    package_dir={"fusiontrain_kernels": "kernels/fusiontrain_kernels"},
    data_files=[("share/fusiontrain/configs", CONFIGS), ("share/fusiontrain/launch", LAUNCHERS)],
    entry_points={"console_scripts": ["fusiontrain = fusiontrain.cli.main:main"]},
    install_requires=[
        "filelock",
        "fsspec",
        "isal",
        "numpy",
        "omegaconf",
        "orjson",
        "pillow",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "simplejpeg",
        "tenacity",
        "tensorboard",
        "tokenizers",
        "torch>=2.11",
        "transformers>=5",
        "urllib3>=2",
        "webdataset>=1",
        "xxhash>=3",
    ],
    extras_require={
        "gpu": ["flash-attn"],
        "deepspeed": ["deepspeed"],
        "parquet": ["pyarrow"],
        "plots": ["matplotlib"],
        "s3": ["s3fs"],
        "gcs": ["gcsfs"],
        "vae": ["diffusers"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny>=3"],
        "bench": ["megatron-energon"],
        "dev": [
            "deepspeed", "diffusers", "flask", "flask-cors", "gcsfs", "hypothesis", "import-linter", "matplotlib", "mlflow-skinny>=3", "moto[s3]", "mypy",
            "pyarrow", "pyte", "pytest", "pytest-xdist", "ruff", "s3fs", "triton>=3.6; platform_system == 'Linux'", "types-PyYAML", "wandb",
        ],
    },
)
