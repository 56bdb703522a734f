"""How a hub is reached, in the words of `from_pretrained`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAccess:
    """What a user says about downloads; secrets stay out of its text form.

    Args:
        token: Of the hub; True is the one of the login, False none.
        cache_dir: In place of the hub's own cache directory.
        local_files_only: Take what is on this machine and never use the network.
        force_download: Download also what is on this machine.
        proxies: Address by protocol, with huggingface_hub releases that take them.
    """

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False
    proxies: Mapping[str, str] | None = field(default=None, repr=False)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> HubAccess:
        """Return what the arguments of a `from_pretrained` call say."""
        cache_dir = arguments.get("cache_dir")
        return cls(
            token=arguments.get("token"),
            cache_dir=str(cache_dir) if cache_dir is not None else None,
            local_files_only=bool(arguments.get("local_files_only")),
            force_download=bool(arguments.get("force_download")),
            proxies=arguments.get("proxies"),
        )

    def without_force(self) -> HubAccess:
        """Return the same for ranks that find what another one has downloaded already."""
        return replace(self, force_download=False)

    def in_cache(self) -> dict[str, Any]:
        """Return the arguments for a look into the cache."""
        return {} if self.cache_dir is None else {"cache_dir": self.cache_dir}

    def for_download(self, download: Callable[..., Any]) -> dict[str, Any]:
        """Return the arguments for a download; what was not said is left to the hub's library.

        Args:
            download: That will get them.

        Raises:
            ConfigurationError: The installed library does not take one of them.
        """
        given: dict[str, Any] = self.in_cache()
        if self.token is not None:
            given["token"] = self.token
        if self.force_download:
            given["force_download"] = True
        if self.proxies is not None:
            given["proxies"] = dict(self.proxies)
            parameters = inspect.signature(download).parameters.values()
            if not any(p.name == "proxies" or p.kind is p.VAR_KEYWORD for p in parameters):
                raise ConfigurationError(
                    "proxies: expected a huggingface_hub that takes them, got a release from 1.0 on. Leave proxies out and set "
                    "HTTPS_PROXY and HTTP_PROXY in the environment."
                )
        return given
