"""Texts that never mix: a tenth is held out only where a source has no validation split of its own."""

import pytest

from neural_plasticity import experiment
from neural_plasticity.errors import InvalidArgument, MissingSplit
from neural_plasticity.experiment import ExperimentConfig, _split_texts
from neural_plasticity.sources import load_texts

PARAGRAPHS = [f"Paragraph number {number} of a small text." for number in range(30)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


def test_a_plain_file_is_split_three_ways(file):
    with pytest.raises(MissingSplit, match="there are 'train'"):
        load_texts(str(file), split="validation")
    train, selection, validation = _split_texts(ExperimentConfig(dataset_name=str(file)))
    assert sorted(train + selection + validation) == sorted(PARAGRAPHS) and len(validation) == 3 and len(selection) == 3


def test_a_validation_split_that_cannot_be_read_is_an_error(file, monkeypatch):
    def broken(name, split=None, **source):
        if split == "validation":
            raise InvalidArgument("text_column is 'text', but that column is not there")
        return load_texts(name, split=split, **source)

    monkeypatch.setattr(experiment, "load_texts", broken)
    with pytest.raises(InvalidArgument, match="text_column"):
        _split_texts(ExperimentConfig(dataset_name=str(file)))
