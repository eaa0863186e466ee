"""Which engine gets a request: one that knows the beginning of its prompt, or the least loaded."""

from collections.abc import Sequence

from headwater.client.engine_choice import choose_engine
from headwater.client.errors import EngineOut, NoSuchEngine
from headwater.client.fleet import Fleet
from headwater.client.link import EngineLink
from headwater.client.prefix_routes import PrefixRoutes
from headwater.client.standing import LOADING
from headwater.messages.generation import Generate


class RequestRouter:
    """Chooses among the engines that serve, and remembers which of them got which prompts."""

    def __init__(self, links: Sequence[EngineLink], fleet: Fleet) -> None:
        self._links = links
        self._fleet = fleet
        self._routes: PrefixRoutes | None = None  # only with several engines

    def why_out(self, link: EngineLink) -> str | None:
        """Why an engine takes no requests; None if it does."""
        if link.gone is not None:
            return str(link.gone)
        return self._fleet.why_out(link.index) or (LOADING if link.ready is None else None)

    def choose(self, request: Generate, *, engine: int | None) -> EngineLink:
        """The link to `engine`, or to the best one. Raises EngineGone, EngineOut, NoSuchEngine."""
        if engine is None:
            return self._best(request)
        if not 0 <= engine < len(self._links):
            raise NoSuchEngine(engine, len(self._links))
        if (why := self._fleet.why_out(engine)) is not None:
            raise EngineOut(engine, why)
        return self._links[engine]

    def sent(self, request: Generate, link: EngineLink) -> None:
        """The engine behind `link` computes this prompt."""
        if self._routes is None and len(self._links) > 1:
            page_size = next((each.ready.page_size for each in self._links if each.ready), None)
            self._routes = PrefixRoutes(page_size=page_size) if page_size else None
        if self._routes is not None:
            self._routes.learn(request, link.index)

    def forget(self, engine: int) -> None:
        """`engine` has lost its cache."""
        if self._routes is not None:
            self._routes.forget(engine)

    def forget_all(self) -> None:
        """The engines' caches were emptied: a known prefix is no longer a reason to prefer an engine."""
        if self._routes is not None:
            self._routes.clear()

    def _best(self, request: Generate) -> EngineLink:
        links = [self._links[index] for index in self._fleet.candidates()]
        if not links and self._fleet.desired is None:  # all engines load for the first time: each is a candidate
            links = [link for link in self._links if not link.gone]
        if links:
            return choose_engine(links, self._routes.known(request) if self._routes else [])
        for link in self._links:
            if self._fleet.why_out(link.index) is not None:
                raise EngineOut(link.index, self.why_out(link) or LOADING)
        raise self._links[0].gone or EngineOut(0, LOADING)
