"""What several of the tests with peers share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.image import CannotBuildError, Image, remove

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image, built once."""
    directory = tmp_path_factory.mktemp("image")
    try:
        yield Image(directory)
    except CannotBuildError as error:
        pytest.skip(f"the image cannot be built here now: {error}")
    finally:
        remove(directory)
