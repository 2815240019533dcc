"""Rules that look with other models: classifiers of images in ONNX files, the language of texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from multimodal.filters.classifier import Classifier, ClassifierFile
from multimodal.filters.rules import Filters, Rule, RuleFile, refusal

onnx = pytest.importorskip("onnx")
COLOURS = ("red", "green", "blue")


def colours(path: Path, size: int | str = 8) -> Path:
    """A classifier whose scores are ten times the means of the three channels."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Mul", ["flat", "ten"], ["scores"]),
    ]
    ten = numpy_helper.from_array(np.float32([10.0]), "ten")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, size, size])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 3])
    graph = helper.make_graph(nodes, "colours", [pixels], [scores], [ten])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def about(**more: Any) -> ClassifierFile:
    values = {"file": "colours.onnx", "labels": COLOURS, "refuse": {"red": 0.9}, **more}
    return ClassifierFile(**values)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "none"])
def test_probabilities_are_those_of_the_pixels(tmp_path: Path, scores: Any) -> None:
    colours(tmp_path / "colours.onnx", "side")
    colour = np.array([200, 40, 90])
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    limits = about(size=16, mean=tuple(mean), std=tuple(std), scores=scores)
    found = Classifier(limits, tmp_path).probabilities(Image.new("RGB", (30, 20), tuple(colour)))
    raw = 10 * (colour / 255 - mean) / std
    expected = {
        "softmax": np.exp(raw) / np.exp(raw).sum(), "sigmoid": 1 / (1 + np.exp(-raw)), "none": raw
    }[scores]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_classifier_is_a_rule(tmp_path: Path) -> None:
    colours(tmp_path / "colours.onnx")
    rule = {
        "reason": "no red", "when": ["reply"],
        "onnx": {"file": "colours.onnx", "labels": list(COLOURS), "refuse": {"red": 0.9}},
    }  # fmt: skip
    (tmp_path / "red.yaml").write_text(yaml.safe_dump(rule), "utf-8")
    filters = Filters.read(tmp_path)
    refused = refusal(filters.image(Image.new("RGB", (9, 9), "red"), "reply"))
    assert refused is not None and (refused.rule, refused.reason) == ("red", "red 1.00")
    assert not filters.image(Image.new("RGB", (9, 9), "red"), "prompt")
    assert not filters.image(Image.new("L", (9, 9), 255), "reply"), "white is a third of each"
    assert filters.text("red", "reply") == ("red", [])


def test_files_that_are_no_classifiers(tmp_path: Path) -> None:
    colours(tmp_path / "colours.onnx", "side")
    (tmp_path / "broken.onnx").write_bytes(b"no")
    for wrong, reason in (
        ({}, "give size"),
        ({"file": "broken.onnx"}, "broken.onnx"),
        ({"file": "missing.onnx"}, "missing.onnx"),
        ({"size": 8, "labels": ("red", "green")}, "gives 3 scores, and there are 2 labels"),
    ):
        with pytest.raises(ValueError, match=reason):
            Classifier(about(**wrong), tmp_path)
    for wrong in ({"refuse": {"pink": 0.5}}, {"refuse": {}}, {"refuse": {"red": 2}}, {"std": (0,)}):
        with pytest.raises(ValueError, match=r"refuse|std"):
            about(**wrong)


def test_languages_other_than_those_named_are_refused() -> None:
    pytest.importorskip("py3langid")
    file = RuleFile(reason="only English and German", languages=("en", "de"))
    filters = Filters([Rule("languages", file)])
    good = (
        "Two dogs run on the beach while the sun goes down.",
        "Zwei Hunde laufen bei Sonnenuntergang am Strand.",
        "", "a", "ok", "12345", "http://a.b/c", "le chat", "print(x[0])", "A red bus in Paris.",
    )  # fmt: skip
    bad = (
        "Deux chiens courent sur la plage au coucher du soleil.",
        "Dos perros corren por la playa mientras se pone el sol.",
        "Две собаки бегут по пляжу на закате.",
        "犬が二匹、夕日の浜辺を走っています。",
    )
    for text in good:
        assert filters.text(text, "prompt") == (text, []), text
    for text in bad:
        assert refusal(filters.text(text, "prompt")[1]) is not None, text
    for wrong in ((), ("english",)):
        with pytest.raises(ValueError, match="languages: "):
            Rule("languages", RuleFile(reason="a", languages=wrong))
