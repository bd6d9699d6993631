"""Settings as flat parameters, a stage's numbers, and the heat map."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from loda.state import Artifact
from orchestrate.figures import accuracy_heatmap
from orchestrate.measurements import flat_params, stage_metrics


def test_flat_params() -> None:
    values = {"a": {"b": 1, "c": None, "d": {}}, "e": ["x", 2], "f": "text", "g": True}
    expected = {"a.b": "1", "a.c": "null", "a.d": "{}", "e": '["x", 2]', "f": "text", "g": "true"}
    assert flat_params(values) == expected


def test_a_joint_method_has_one_stage_over_all_tasks() -> None:
    evaluation = Artifact({}, {"correct": [1, 4], "count": [4, 4]})
    metrics = stage_metrics({"evaluate": evaluation}, [evaluation], (0, 1), ["a", "b (c)"])
    expected = {"accuracy_seen": 62.5, "accuracy_seen_macro": 62.5, "accuracy_on/0 a": 25, "accuracy_on/1 b _c_": 100}
    assert metrics == expected | {"seconds/evaluate": 0, "seconds/stage": 0}


def test_a_stage_tells_what_it_trained_and_how_long_an_image_took() -> None:
    steps = {
        "observe": Artifact({}, {"images": 4}, {"seconds": 1.0}),
        "adapt": Artifact({}, {"trainable_parameters": 1536}, {"seconds": 6.0}),
        "consolidate": Artifact({}, {}, {"seconds": 3.0}),
        "evaluate": Artifact({}, {"correct": [1], "count": [4]}, {"seconds": 90.0}),
    }
    metrics = stage_metrics(steps, [steps["evaluate"]], (0,), ["a"])
    assert metrics["trainable_parameters"] == 1536
    assert metrics["seconds_per_image"] == 2.5


def test_a_heat_map_needs_a_name_for_each_task() -> None:
    with pytest.raises(ValueError, match="one for each of 3 columns"):
        accuracy_heatmap(np.zeros((3, 3)), ["a"])
    many = accuracy_heatmap(np.full((40, 40), 50.0), ["a rather long name of a task"] * 40)
    with Image.open(io.BytesIO(many)) as image:
        assert max(image.size) < 2000
