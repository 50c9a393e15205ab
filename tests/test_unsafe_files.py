"""No file that somebody else may have written can run code here: no pickle is loaded, Keras stays in safe mode."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from malaria_ray.errors import DirectoryError, ModelError
from malaria_ray.models.engines import open_engine
from malaria_ray.runtime import storage

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "malaria_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])
FORBIDDEN = {
    "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "pickle.Unpickler", "joblib.load",
    "pd.read_pickle", "torch.load", "shelve.open", "marshal.loads", "eval", "exec", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip


def calls_of(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_call_can_run_what_a_file_says(file: Path):
    for call in calls_of(file):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert ".".join(name.split(".")[-2:]) not in FORBIDDEN, f"{file}:{call.lineno}"
        assert "enable_unsafe_deserialization" not in name, f"{file}:{call.lineno}"
        assert given.get("safe_mode", "True") == "True", f"{file}:{call.lineno}"
        if name.split(".")[-2:] in (["np", "load"], ["numpy", "load"]):
            assert given.get("allow_pickle", "False") == "False", f"{file}:{call.lineno}"


class Attack:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_a_table_with_pickled_objects_is_refused_and_none_is_loaded(tmp_path: Path):
    """Ray Data brings an Arrow type whose values are unpickled as soon as somebody looks at them."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray, ArrowPythonObjectType

    mark = tmp_path / "mark"
    pickled = pa.array([pickle.dumps(Attack(mark))], pa.large_binary())
    column = ArrowPythonObjectArray.from_storage(ArrowPythonObjectType(), pickled)
    column.to_pylist()
    assert mark.exists(), "the attack would work"
    mark.unlink()
    file = storage.locate(str(tmp_path / "part-00000.parquet"))
    for table in (pa.table({"image_id": column}), pa.table({"x": pa.StructArray.from_arrays([column], ["image_id"])})):
        storage.write_table(file, table)
        with pytest.raises(DirectoryError, match="no plain table"):
            storage.read_table(file)
        with pytest.raises(DirectoryError, match="no plain table"):
            storage.read_table(storage.locate(str(tmp_path)))
    assert not mark.exists()


def test_a_keras_model_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path: Path):
    import keras

    mark = tmp_path / "mark"

    code = eval(f"lambda x: (open({str(mark)!r}, 'w').close(), x)[1]")  # Keras stores the bytecode of a lambda
    keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Lambda(code)]).save(tmp_path / "model.keras")
    mark.unlink()
    keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert mark.exists(), "the attack would work"
    mark.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_engine("keras", (tmp_path / "model.keras").read_bytes(), n_threads=1, batch_size=2)
    assert not mark.exists()
