import ast
import re
import shutil
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "exact_megatron" / "__init__.py").read_text()).group(1)

extras = {
    # text to .bin/.idx
    "prepare": ["tokenizers>=0.20", "zstandard", "pyarrow", "rich"],
    # tables and pictures; scipy: intervals over runs
    "report": ["matplotlib>=3.7", "rich", "scipy"],
    # the native runner; NVIDIA's apex and transformer-engine come from a container or from source, and are found when there.
    # psutil, six, regex, pyyaml and einops are imported by megatron-core without being declared.
    "train": [
        "torch>=2.6",
        "megatron-core>=0.16.1",
        "omegaconf>=2.3",
        "tensorboard",
        "rich",
        "psutil",
        "six",
        "regex",
        "pyyaml",
        "einops",
        "packaging",
    ],
    # published models in and out; gguf and accelerate read the small real model of examples/continued_pretraining
    "hf": ["safetensors", "huggingface_hub", "transformers>=4.51", "accelerate", "gguf"],
}
# lm-eval pins python-dateutil below the newest, so that this extra is in neither `all` nor `dev`: an environment of its own
evaluation = [
    "lm-eval[hf,ruler]>=0.4.13,<0.5",
    "transformers>=4.56",
    "torch>=2.6",
    "tokenizers>=0.20",
    "matplotlib>=3.7",
    "rich",
    "tqdm",
]
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})
# tqdm and pydantic: Megatron-LM's own, for `make test-upstream`.
extras["dev"] = [
    *extras["all"],
    "tqdm",
    "pydantic",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis",
    "ruff>=0.6",
    "mypy>=1.11",
    "pre-commit",
]
extras["eval"] = evaluation


class BuildWithProjectFiles(build_py):
    """Puts the repository's folders for users into the package, for `exact-megatron files`; commands/files.py has the names."""

    def run(self):
        super().run()
        if self.editable_mode:  # the command reads them from the checkout
            return
        statements = ast.parse((here / "exact_megatron" / "commands" / "files.py").read_text()).body
        (folders,) = (
            ast.literal_eval(statement.value)
            for statement in statements
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "FOLDERS"
        )
        target = Path(self.build_lib, "exact_megatron", "project_files")
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
        for folder in folders:
            shutil.copytree(here / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))


setup(
    name="exact-megatron",
    version=version,
    description="EXACT (arXiv 2605.10544) for Megatron: more supervision for targets that see a long context",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # hydra_plugins is Hydra's namespace, shared with other distributions: no __init__.py there. Named itself too, or an
    # editable install hides the folder from Hydra's scan.
    packages=[
        *find_packages(include=["exact_megatron", "exact_megatron.*"]),
        *find_namespace_packages("exact_megatron/integrations", include=["hydra_plugins", "hydra_plugins.*"]),
    ],
    package_dir={"hydra_plugins": "exact_megatron/integrations/hydra_plugins"},
    package_data={"exact_megatron": ["py.typed"], "exact_megatron.reporting": ["comparison.md"]},
    cmdclass={"build_py": BuildWithProjectFiles},
    install_requires=["numpy>=1.24"],
    extras_require=extras,
    entry_points={"console_scripts": ["exact-megatron = exact_megatron.cli:main"]},
)
