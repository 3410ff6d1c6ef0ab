"""Rules about the package as a whole: its public names, and who may import whom."""

import ast
import collections
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import accumtune

PACKAGE = Path(accumtune.__file__).parent
FRAMEWORKS = ("tensorflow", "jax", "torch", "keras", "keras_tuner", "mlflow", "matplotlib")

# The floors of the house, ground first (DESIGN section 3). A module imports from its own floor or one below;
# trials write the journal, so tracking is below them.
FLOORS = [
    {"errors", "memory.budget", "memory.machine", "memory.units"},
    {"accumulation"},
    {"memory"},
    {"tracking"},
    {"worker"},
    {"search.feasibility"},
    {"execution", "oracles"},
    {"hypermodel"},
    {"config"},
    {"search"},
    {"tuners"},
    {"commands"},
    {"cli"},
    {"__main__"},
]


def floor_of(module):
    """Returns the number of the layer of `accumtune.<module>`; the longest matching name decides."""
    found = [
        (len(name), number)
        for number, floor in enumerate(FLOORS)
        for name in floor
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name and not name.startswith("docs."):  # a plug-in of mkdocs, not part of the package
            yield name, path


def top_level_imports(tree):
    """Imports that run when the module is imported: not those inside functions or `if TYPE_CHECKING`."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))


def test_all_names_the_public_api():
    promised = {
        "accumulate", "batch_coupled_layers", "profile", "RandomSearch", "BayesianOptimization", "Hyperband",
        "GridSearch", "AccumulationHyperModel", "load_config", "TrainingConfig", "Candidate", "errors",
    }  # fmt: skip
    assert promised <= set(accumtune.__all__)
    assert sorted(accumtune.__all__) == accumtune.__all__
    for name in accumtune.__all__:
        assert getattr(accumtune, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = accumtune.no_such_name


@pytest.mark.parametrize("name, path", list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_run_one_way(name, path):
    floor = floor_of(name)
    assert floor is not None, f"accumtune.{name} stands on no floor: put it into FLOORS"
    for imported in top_level_imports(ast.parse(path.read_text())):
        if imported.startswith("accumtune."):
            other = floor_of(imported.removeprefix("accumtune."))
            assert other is None or other <= floor, f"accumtune.{name} imports {imported}, which is above it"


def imports_between(trees):
    """Module -> the modules of the package that it imports when it is imported itself."""
    graph = {}
    for name, tree in trees.items():
        found = {imported.removeprefix("accumtune.") for imported in top_level_imports(tree)} & set(trees)
        # `from accumtune.memory import device` is about the module, not about its package.
        packages = {other.rpartition(".")[0] for other in found}
        graph[name] = found - packages - {name}
    return graph


def test_no_modules_import_each_other_in_a_circle():
    trees = {name: ast.parse(path.read_text()) for name, path in modules()}
    assert list(graphlib.TopologicalSorter(imports_between(trees)).static_order())


def test_what_simulates_an_allocator_is_used_through_its_package():
    parts = "memory.cpu_simulation."
    for name, path in modules():
        if not name.startswith(parts.rstrip(".")):
            for node in ast.walk(ast.parse(path.read_text())):
                inside = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"accumtune.{parts}")
                assert not inside, f"accumtune.{name} imports {ast.unparse(node)}"


def test_the_rule_would_notice_a_circle():
    circle = {"one": "import accumtune.two", "two": "from accumtune.three import name", "three": "import accumtune.one"}
    graph = imports_between({name: ast.parse(text) for name, text in circle.items()})
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_the_rule_would_notice_an_import_upwards():
    imported = set(top_level_imports(ast.parse("from accumtune.search import tuner\nimport keras")))
    assert {"accumtune.search.tuner", "keras"} <= imported
    assert floor_of("search.tuner") > floor_of("memory.prediction.profile") > floor_of("memory.budget")


def test_no_folder_is_a_long_flat_list_of_files():
    files = collections.Counter(path.parent for _, path in modules() if path.name != "__init__.py")
    folder, count = files.most_common(1)[0]
    assert count <= 15, f"{folder} has {count} files: those that belong together share a sub-folder"


TOP_LEVEL = {".ci", ".gitignore", "README.md", "accumtune", "experiments", "mlruns", "pyproject.toml", "tests"}


def test_nothing_else_is_at_the_top_level():
    if not (PACKAGE.parent / ".git").exists():
        pytest.skip("this is no clone of the repository")
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout
    assert {path.partition("/")[0] for path in listed.split()} == TOP_LEVEL
    assert [path for path in listed.split() if path.startswith("mlruns/")] == ["mlruns/README.md"]


def test_import_accumtune_loads_no_framework():
    script = f"""
import sys, accumtune
loaded = [name for name in {FRAMEWORKS!r} if name in sys.modules]
assert not loaded, loaded
accumtune.errors
assert "keras" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
