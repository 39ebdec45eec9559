"""One place where a stage takes visual tokens away, or is asked about them."""

from __future__ import annotations

import dataclasses

from prunekit.pipeline.stage import Stage
from prunekit.strategy import inputs as table
from prunekit.strategy.sites import Keep, Site


@dataclasses.dataclass(frozen=True)
class Cut:
    """One place where a stage takes visual tokens away. A stage with a list of sites has several, numbered from 0.

    keep: None for a strategy that decides by itself. sites: all of the stage's, in the order of the data; empty for a
    router.
    """

    site: Site
    stage: Stage
    keep: Keep | None
    number: int
    sites: tuple[Site, ...] = ()

    @property
    def asked_at(self) -> Site:
        """Where its strategy is asked: a router at `route_at`, wherever tokens leave by its scores."""
        return self.stage.route_at if self.stage.is_router else self.site

    def comes_before(self, router: Stage) -> bool:
        """Its tokens have left when that router is asked: after all other stages there, routers in their order."""
        if self.site != router.route_at:
            return self.site < router.route_at
        return not self.routes_here or self.stage.index < router.index

    @property
    def routes_here(self) -> bool:
        """Its stage is a router that is asked at this very site."""
        return self.stage.is_router and self.stage.route_at == self.site

    @property
    def drops_all(self) -> bool:
        """It leaves no visual token."""
        return self.stage.drops_all

    @property
    def decides(self) -> bool:
        """How many tokens it leaves is not known before it runs: its strategy is told no number, or does not ask."""
        return not self.drops_all and (self.keep is None or not self.stage.counts)

    @property
    def label(self) -> str:
        """As messages name it: `stages[0] fastv`, of several sites `stages[0] fastv at '4'`."""
        several = len(self.stage.sites_given or ()) > 1
        return self.stage.label + (f" at '{self.site}'" if several else "")

    def key(self, name: str) -> str:
        """The key path below the stage of `at` or of a budget of this cut: `keep` or `keep[2]`."""
        listed = f"{name}[{self.number}]"
        return listed if listed in self.stage.keys else name

    def reads(self, layers: int) -> dict[int, str]:
        """The decoder layers, of `layers`, whose run gives it an input, with the name of that input.

        Raises ValueError for an input that there is not at its site.
        """
        names = (*table.OF_DECODER_LAYERS, "previous_hidden")
        asked = frozenset(name for name in names if self.stage.asks_for(name))
        return table.layers_read(self.stage.inputs, asked, self.asked_at, layers)
