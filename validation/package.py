"""The archives of a version as others get them: `python validation/package.py DIST ENVIRONMENT`.

DIST has one sdist and one wheel; ENVIRONMENT is an empty virtual environment, into which the wheel goes. What is run
there is run in an empty folder, so that nothing comes from the checkout.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNWANTED = ("torchtitan", "pytest", "matplotlib", "safetensors")
"""Packages that `nsa` alone must not bring."""


def data() -> set[str]:
    """Files of the package that are not Python."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "nsa").rglob("*.*")
        if path.suffix in (".toml", ".json", ".typed")
    }


def example() -> str:
    """The first Python of the README: the layer alone."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1] + "\nassert y.shape == (1, 2048, 512)\n"


def check(dist: Path, environment: Path) -> None:
    """Looks into the archives, and at the wheel where nothing else is installed.

    Raises:
        AssertionError: a file is missing, or a package that nobody asked for was brought.
        subprocess.CalledProcessError: the wheel cannot be installed or imported.
    """
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert data()
    assert data() <= inside, f"{wheel.name} lacks {data() - inside}"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = data() | {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "pyproject.toml"}
    assert wanted <= names, f"{sdist.name} lacks {wanted - names}"

    python = environment / "bin" / "python"
    with tempfile.TemporaryDirectory() as empty:

        def run(*arguments: str) -> str:
            command = [str(python), *arguments]
            return subprocess.run(command, cwd=empty, check=True, stdout=subprocess.PIPE, text=True).stdout

        run("-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel))
        brought = {line.partition("==")[0].lower() for line in run("-m", "pip", "freeze").splitlines()}
        assert not brought & set(UNWANTED), f"nsa alone brings {brought & set(UNWANTED)}"
        print("nsa", run("-c", "import nsa; print(nsa.__version__, nsa.__file__)").strip())
        run("-c", example())
        missing = run("-c", "try: import nsa.train\nexcept ModuleNotFoundError as e: print(e)")
        assert "nsa[titan]" in missing, f"without TorchTitan: {missing!r}"
        run(
            "-c",
            "from nsa.kernels.configs import *; from pathlib import Path; import nsa\n"
            "assert (Path(nsa.__file__).parent / 'configs' / 'debug.toml').exists()",
        )
    print(f"{wheel.name}, {sdist.name}: {len(data())} files beside Python; the example of the README runs")


if __name__ == "__main__":
    check(*(Path(argument).resolve() for argument in sys.argv[1:]))
