"""Installation: `pip install -e '.[test]'`. Every pin has its reason beside it."""
from pathlib import Path
import re

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lskd_jax" / "__init__.py").read_text())[1]

JAX = ">=0.10.2,<0.11"  # 0.10.2: sharding types as used here; 0.11.1 breaks flax up to 0.12.8

setup(
    name="lskd_jax",
    version=VERSION,
    description="Localized symbolic knowledge distillation: vision-language models that can be "
                "pointed at, in JAX",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",  # the oldest that jax 0.10 runs on
    packages=find_packages(include=["lskd_jax*", "data_pipeline*", "configs*", "launch*"]),
    package_data={
        # What the report and the published dataset need beside code.
        "data_pipeline": ["**/*.jinja", "**/*.html", "**/*.md", "**/*.bib", "**/*.txt"],
        "launch": ["*.sh"],
    },
    entry_points={"console_scripts": ["lskd = lskd_jax.cli:main"]},
    # A lower bound is the version that this was developed and tested with, unless a comment says
    # otherwise. Packages below version 1 may break in any minor version, hence their upper bounds.
    install_requires=[
        # --- models and training
        f"jax{JAX}",
        "flax>=0.12.8,<0.13",  # NNX modules as plain pytrees; metadata keys were renamed in 0.12.4
        "optax>=0.2.8,<0.3",  # a checkpoint holds the optimizer's state as optax lays it out
        "orbax-checkpoint>=0.12.8,<0.13",  # the layout on disk and the errors were tested with it
        "tensorstore>=0.1.86",  # reads a row of a stored array; comes with orbax
        "safetensors>=0.8,<0.9",  # PyTorch's weights; comes with transformers
        "ml-dtypes>=0.5",  # bfloat16 for NumPy; comes with jax
        "etils[epath]>=1.15",  # paths on a disk or in a bucket; comes with orbax
        "ml-collections>=1.1,<2",  # configs, and flags that override them
        "tensorboardX>=2.6.5,<3",  # TensorBoard's files without TensorFlow
        # --- data
        "numpy>=2.0,<3",  # what jax 0.10 needs
        "grain>=0.2.18,<0.3",  # random access and shuffles whose state is one integer
        "array_record>=0.8.6,<0.9",  # the file format of the published dataset
        "tensorflow-datasets>=4.9.10,<4.10",  # builds and reads datasets without TensorFlow
        "importlib_resources>=6",  # tensorflow-datasets imports it, and declares it for old Pythons
        "pillow>=11",  # not 13, with which this was tested too: apache-beam holds it below
        "simplejpeg>=1.9,<2",  # decodes JPEG several times faster than pillow
        "transformers>=5.23,<5.24",  # weights are mapped by key, and keys change between minors
        "tokenizers>=0.23.1,<0.24",  # what transformers 5.23 needs
        "pyyaml>=6.0",  # Kubernetes and SkyPilot files; comes with orbax
        # --- teachers, reports, progress
        "openai>=3.52,<4",  # client of any server with this protocol; majors rename calls
        "jinja2>=3.1",  # no feature newer than this is used; the same for those below
        "markupsafe>=3.0",  # escapes what the report shows; comes with jinja2
        "matplotlib>=3.10",
        "tqdm>=4.66",
        "plotext>=5.3.2,<6",  # curves in a terminal; 6 has another interface
    ],
    extras_require={
        "test": [
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",  # tests on all cores: nearly all of their time is compilation
            # The reference that parity tests compare with: one exact version, so that a changed
            # kernel there cannot look like an error here. Its CPU build is enough.
            "torch==2.13.0",
            "ruff>=0.17,<0.18",  # each minor brings new rules
        ],
        "tpu": [f"jax[tpu]{JAX}"],  # lets a machine without a TPU compile for one, too
        # Building a corpus on many machines. It holds protobuf, pillow and pyarrow at older
        # versions, and so is not part of a plain installation.
        "beam": ["apache-beam>=2.77,<3"],
    },
)
