"""The configuration: YAML files in, a checked `Loaded` out, or a ConfigError with every mistake."""

from gateway.config.files import GatewayFile, TeamFile
from gateway.config.load import Loaded, import_go_proxy, load

__all__ = ("GatewayFile", "Loaded", "TeamFile", "import_go_proxy", "load")
