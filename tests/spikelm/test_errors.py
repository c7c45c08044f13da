"""spikelm.errors"""

from __future__ import annotations

import inspect

import pytest

from spikelm import errors


def error_classes() -> list[type[Exception]]:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    return [c for c in found if issubclass(c, Exception) and c.__module__ == errors.__name__]


@pytest.mark.parametrize("error", error_classes())
def test_every_error_is_one_tree_and_drawn_in_it(error: type[Exception]) -> None:
    assert issubclass(error, errors.SpikelmError)
    assert error.__name__ in (errors.__doc__ or "")


def test_request_error_carries_what_the_response_needs() -> None:
    error = errors.RequestError("no", status=404, param="model", code="model_not_found")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert errors.RequestError("no").status == 400


def test_missing_extra_says_what_to_install() -> None:
    assert 'pip install "spikelm[serve]"' in str(errors.MissingExtraError("uvicorn", "serve"))


def test_did_you_mean() -> None:
    assert errors.did_you_mean("trian", ["train", "serve"]) == "did you mean 'train'?"
    assert errors.did_you_mean("xyz", ["train", "serve"]) == "allowed: serve, train"
