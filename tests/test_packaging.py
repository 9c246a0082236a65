"""The package as others get it: a wheel in another folder, the checkout, and a machine with the fewest packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What `import icon2_rt` and the engine may import, beside what these five need themselves.
ENGINE = ("torch", "triton", "transformers", "safetensors", "numpy")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that must succeed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, *, cwd: Path, flags: tuple[str, ...] = (), **environment: str) -> str:
    return run(sys.executable, *flags, "-c", textwrap.dedent(code), cwd=cwd, **environment)


def sources() -> dict[str, Path]:
    """Where every module belongs in an installed package → where it lies in the checkout."""
    package = {f"icon2_rt/{p.relative_to(ROOT / 'icon2_rt')}": p for p in (ROOT / "icon2_rt").rglob("*.py")}
    kernels = {f"icon2_rt/kernels/{p.relative_to(ROOT / 'kernels')}": p for p in (ROOT / "kernels").rglob("*.py")}
    return package | kernels


# --- what pyproject.toml and the constraints say ---------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = dict(line.split("==") for line in lines if line)
    return {canonicalize_name(package): version for package, version in found.items()}


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [*PROJECT["project"]["dependencies"], *(text for extra in extras.values() for text in extra)]
    return [r for r in map(Requirement, texts) if canonicalize_name(r.name) != "icon2-rt"]


def test_every_folder_with_modules_is_packaged() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        {name.rpartition("/")[0].replace("/", ".") for name in sources()}
    )


def test_core_dependencies_are_few() -> None:
    core = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    assert {r.name for r in core} == {*ENGINE, "gguf", "pyarrow", "typer", "rich"}
    assert [str(r.marker) for r in core if r.marker] == ['sys_platform == "linux"']


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_pin_what_the_project_allows(name: str) -> None:
    pinned = pins(name)
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    assert core <= pinned.keys()
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement} against {version}"


def test_constraints_pin_every_tool() -> None:
    assert {canonicalize_name(r.name) for r in requirements()} <= pins("constraints.txt").keys()


def test_the_tested_and_the_oldest_versions() -> None:
    tested, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert (tested["torch"], tested["triton"], tested["transformers"]) == ("2.13.0", "3.7.1", "5.23.0")
    assert (oldest["torch"], oldest["triton"], oldest["transformers"]) == ("2.13.0", "3.6.0", "5.17.0")


def test_constraints_name_packages_only() -> None:
    for name in ("constraints.txt", "constraints-oldest.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)] == []


def test_what_is_installed_is_supported() -> None:
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(metadata.version(requirement.name)), requirement


@pytest.mark.parametrize("target", ["demo", "test", "test-oldest", "lint", "type", "fmt", "bench", "docs", "mutants"])
def test_each_habit_is_one_command(target: str) -> None:
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()
    assert "venv" in run("make", "--dry-run", target, cwd=ROOT)


def test_ci_runs_what_a_person_runs() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "exec make test lint type" in (ROOT / ".ci" / "run").read_text()


# --- the checkout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_kernels_and_transformers_from_the_checkout_and_from_elsewhere(where: str, tmp_path: Path) -> None:
    """kernels/ is icon2_rt.kernels; and transformers, which looks for a package named kernels, is not misled by it."""
    code = """
        import icon2_rt.kernels, transformers
        from transformers.utils import is_kernels_available
        import transformers.models.llama.modeling_llama
        print(icon2_rt.kernels.__file__, is_kernels_available())
    """
    out = python(code, cwd=ROOT if where == "checkout" else tmp_path)
    assert out.split() == [str(ROOT / "kernels" / "__init__.py"), "False"]


def test_the_tests_are_a_package_that_none_installed_can_hide(tmp_path: Path) -> None:
    """Some distributions install one named tests; a folder without __init__.py loses against it from any place."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    path = os.pathsep.join([str(ROOT), str(tmp_path)])  # as `pythonpath` of pytest's settings puts it: ours first
    out = python("import tests.noise; print(tests.noise.__file__)", cwd=tmp_path, flags=("-P",), PYTHONPATH=path)
    assert out.split() == [str(ROOT / "tests" / "noise.py")]


def test_kernels_import_nothing_but_triton_and_torch() -> None:
    """A bare `import kernels` finds this folder from the checkout: then too it may pull in nothing else."""
    standard = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}
    allowed = standard | {"torch", "triton", "icon2_rt.kernels"}
    for path in (ROOT / "kernels").rglob("*.py"):
        modules = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), re.MULTILINE)
        assert [m for m in modules if not any(m == a or m.startswith(f"{a}.") for a in allowed)] == [], path


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing of an earlier build gets in and none is left behind."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("icon2_rt", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, tree, cwd=tree)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into, with nothing else in it."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


DATA = ("icon2_rt/py.typed", "icon2_rt/pipeline/charts.css", "icon2_rt/pipeline/page.css")


def test_wheel_is_pure_python_and_complete(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        written = {n: archive.read(n) for n in names}
    model = {f"icon2_rt/tiny/model/{p.name}": p for p in (ROOT / "icon2_rt/tiny/model").iterdir()}
    expected = sources() | model | {name: ROOT / name for name in DATA}
    assert names == expected.keys()
    assert {n for n, content in written.items() if content != expected[n].read_bytes()} == set()
    assert any(name.endswith(".safetensors") for name in model)


def test_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = """
        import icon2_rt, icon2_rt.kernels, icon2_rt.tiny
        from importlib.metadata import version
        rt = icon2_rt.Runtime.from_pretrained(icon2_rt.tiny.path())
        (completion,) = rt.generate([[{"role": "user", "content": "hello"}]], max_new_tokens=4, do_sample=False)
        assert 1 <= len(completion.token_ids) <= 4, completion
        print(icon2_rt.__file__, icon2_rt.kernels.__file__, icon2_rt.tiny.path(), version("icon2_rt"), sep="\\n")
    """
    package, kernels, model, version = python(code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(package) == installed / "icon2_rt" / "__init__.py"
    assert Path(kernels) == installed / "icon2_rt" / "kernels" / "__init__.py"
    assert Path(model) == installed / "icon2_rt" / "tiny" / "model"
    assert version == PROJECT["project"]["version"]


def test_wheel_brings_the_command(installed: Path, tmp_path: Path) -> None:
    out = run(installed / "bin" / "icon2", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    for command in ("demo", "run", "directions", "instructions", "pairs", "bench", "doctor"):
        assert command in out


# --- few packages ----------------------------------------------------------------------------------------------------


def needed_by(roots: tuple[str, ...]) -> set[str]:
    """Names of the distributions that ``roots`` need to be installed, themselves included; extras are not followed."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in roots]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


@pytest.fixture(scope="module")
def engine_only(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to the engine's five packages, what they need, and the installed wheel: nothing else exists.

    transformers asks for typer (and so rich) for a command line of its own; here they are left out, because the
    engine must not notice.
    """
    folder = tmp_path_factory.mktemp("site")
    for name in needed_by(ENGINE) - {"typer", "rich"}:
        distribution = metadata.distribution(name)
        tops = {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (folder / top).exists():  # several distributions may share a namespace
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    for entry in installed.iterdir():
        if entry.name.startswith("icon2_rt"):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_import_and_engine_need_five_packages(engine_only: Path, tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(engine_only)!r})
        import importlib.util
        for name in ("typer", "rich", "gguf", "pyarrow", "datasets", "trl", "matplotlib", "pytest", "pandas"):
            assert importlib.util.find_spec(name) is None, name
        import icon2_rt, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                             num_attention_heads=4, num_key_value_heads=2)
        rt = icon2_rt.Runtime(LlamaForCausalLM(config))
        d = icon2_rt.Direction("d", torch.randn(3, 32))
        pairs = rt.generate_pairs([[1, 2, 3], [4, 5]], positive=0.1 * d, negative=-0.1 * d, max_new_tokens=3, seed=0)
        d.save("d.safetensors")
        assert torch.equal(icon2_rt.Direction.load("d.safetensors").vectors, d.vectors)
        print(len(pairs), icon2_rt.__file__)
    """
    out = python(code, cwd=tmp_path, flags=("-I", "-S"))
    assert out.split() == ["2", str(engine_only / "icon2_rt" / "__init__.py")]
