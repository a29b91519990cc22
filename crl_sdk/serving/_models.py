"""The models of a server, each with an engine, a queue, a cache and bases of its own."""

from __future__ import annotations

from collections.abc import Mapping

from crl_sdk.basis._basis import Basis
from crl_sdk.errors import BasisMismatchError, UnknownModelError
from crl_sdk.serving._pipeline import Pipeline


class Models:
    """The pipelines of a server by the name of their model. The first is the default.

    Attributes:
        pipelines: Pipelines by name.
        default: Name of the model of requests that name none.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline] | Pipeline) -> None:
        """Store the pipelines.

        Args:
            pipelines: Pipelines by name, the default one first; or the only one, whose name is
                that of its bundle.
        """
        if isinstance(pipelines, Pipeline):
            pipelines = {pipelines.embedder.bundle.manifest.name: pipelines}
        self.pipelines = dict(pipelines)
        self.default = next(iter(self.pipelines))

    def find(self, name: str) -> Pipeline:
        """Return the pipeline of a model.

        Args:
            name: Name of the model; empty for the default one.

        Raises:
            UnknownModelError: If there is none. The message lists the models that there are.
        """
        pipeline = self.pipelines.get(name or self.default)
        if pipeline is None:
            raise UnknownModelError(
                f"no model {name[:80]!r}; known are {list(self.pipelines)}. Name one of them, or "
                f"none for {self.default!r}"
            )
        return pipeline

    def require_model_of(self, basis: Basis, pipeline: Pipeline) -> None:
        """Raise an error if a basis belongs to another model of this server.

        Raises:
            BasisMismatchError: If it does. The message names the model.
        """
        if basis.fingerprint == pipeline.embedder.bundle.fingerprint:
            return
        for name, other in self.pipelines.items():
            if other.embedder.bundle.fingerprint == basis.fingerprint:
                raise BasisMismatchError(
                    f"basis {basis.criterion!r} was made for the model {name!r} of this server: "
                    f"name this model in the request, such as with ClientOptions(model={name!r})"
                )
