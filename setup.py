"""Package metadata. `pip install -e '.[test]'` installs everything `make test` needs."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# In the checkout rsengine/kernels and rsengine/data are links to these folders, which not every system makes.
HOUSES = ("kernels", "data")


def below(name: str, folder: str) -> list[str]:
    """The package ``name`` in ``folder``, and those inside it that are not links."""
    inside = find_packages(folder, exclude=[pattern for house in HOUSES for pattern in (house, f"{house}.*")])
    return [name, *(f"{name}.{package}" for package in inside)]


PACKAGES = below("rsengine", "rsengine") + [each for house in HOUSES for each in below(f"rsengine.{house}", house)]

setup(
    name="rsengine",
    version="0.1.0",
    description="A performance-optimised training engine for ResNet-RS on CIFAR-sized images",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={f"rsengine.{house}": house for house in HOUSES},
    package_data={
        "rsengine": ["py.typed", "recipes/*.toml", "studies/*.toml", "run/page.css", "run/page.js"],
        "rsengine.kernels.native": ["*.c", "*.h"],
    },
    entry_points={"console_scripts": ["rsengine = rsengine.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "numba>=0.60",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "pillow>=10",
        "psutil>=5.9",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tomli-w>=1",
        "tqdm>=4.66",
    ],
    extras_require={
        "ffcv": [
            "ffcv==1.0.2",
            "setuptools",  # ffcv imports distutils, which Python 3.12 and later no longer carry
        ],
        "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "timm>=1.0.9"],
        "mlflow": ["mlflow>=2.14"],
        "pandas": ["pandas>=2"],
        "parquet": ["pyarrow>=14"],
        "ray": ["ray>=2.40"],
        "tensorboard": ["tensorboard>=2.16"],
        "test": [
            "fonttools>=4",
            "hypothesis>=6.100",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "pyarrow>=14",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.8",
            "ruff>=0.6",
            "tensorboard>=2.16",
            "timm>=1.0.9",
            "transformers>=5",
        ],
        "wandb": ["wandb>=0.19"],
    },
)
