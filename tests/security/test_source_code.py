"""The code itself: nothing that loads objects or runs text, and no file of others read but through one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("loda/**/*.py"), *ROOT.glob("orchestrate/**/*.py")])
# Modules that load objects, or carry out what they read.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "jsonpickle"}
# By the last part of a call's name and, where that alone says too little, what stands before it.
CALLS = {"eval", "exec", "compile", "__import__", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}
DOTTED = {
    "os.system", "os.popen", "yaml.load", "yaml.load_all", "pd.read_pickle", "pandas.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.hub.load", "builtins.eval", "builtins.exec",
}  # fmt: skip
# Readers of formats that files of others come in; loda/reading is the door.
READERS = {
    "json.load", "yaml.safe_load", "yaml.safe_load_all", "pq.read_table", "pq.read_schema", "pq.read_metadata",
    "pd.read_parquet", "safetensors.torch.load", "safetensors.torch.load_file", "safe_open", "np.loadtxt",
}  # fmt: skip
DOOR = ROOT / "loda" / "reading"


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of names; what isn't one ends as ``?``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keywords(call: ast.Call) -> dict[str, object]:
    return {word.arg: getattr(word.value, "value", None) for word in call.keywords if word.arg}


def offences(tree: ast.AST, inside_the_door: bool) -> Iterator[str]:
    """What a module must not contain, each with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{line}: import of {name}" for name in names if name.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom) and node.module == "yaml":
                yield f"{line}: names of yaml are to be seen as such"
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), keywords(node)
        if name.rpartition(".")[2] in CALLS and name not in ("re.compile", "torch.compile"):
            if not name.endswith(".eval"):  # a module of torch put into its mode of evaluation
                yield f"{line}: call of {name}"
            elif node.args:
                yield f"{line}: call of {name} with arguments"
        if name in DOTTED or (name in READERS and not inside_the_door):
            yield f"{line}: call of {name}"
        if given.get("shell") or given.get("allow_pickle"):
            yield f"{line}: {name} with shell or allow_pickle"
        if name == "torch.load" and given.get("weights_only") is not True:
            yield f"{line}: torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") is not False:
            yield f"{line}: {name} without allow_pickle=False"
        if given.get("weights_only") is False:
            yield f"{line}: {name} with weights_only=False"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_text_is_run(file: Path) -> None:
    found = list(offences(ast.parse(file.read_text(encoding="utf-8")), file.is_relative_to(DOOR)))
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import joblib.x", "eval('1')", "exec('1')",
        "compile('1', '', 'eval')",
        "torch.load(f)", "torch.load(f, weights_only=False)", "x(weights_only=False)", "yaml.load(t, Loader=L)",
        "subprocess.run(c, shell=True)", "os.system('x')", "np.load(f)", "np.load(f, allow_pickle=True)", "m.eval('x')",
        "yaml.safe_load(t)", "pd.read_parquet(f)", "from yaml import load", "__import__('os')", "pd.read_pickle(f)",
    ],
)  # fmt: skip
def test_the_search_itself_finds_each_of_them(line: str) -> None:
    assert list(offences(ast.parse(line), inside_the_door=False))


@pytest.mark.parametrize(
    "line", ["model.eval()", "re.compile('x')", "torch.load(f, weights_only=True)", "json.loads(t)"]
)
def test_the_search_lets_ordinary_lines_be(line: str) -> None:
    assert not list(offences(ast.parse(line), inside_the_door=False))
