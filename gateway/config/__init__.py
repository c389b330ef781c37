"""The configuration: YAML files in, a checked `Loaded` out, or a ConfigError with every mistake.

Nodes with their places, the settings of each kind of file, the builders that make resources, pools, teams and pipelines
of them, the JSON Schema, the difference between two configurations, and the import of the Go proxy's.
"""

from gateway.config.files import GatewayFile, TeamFile
from gateway.config.load import Loaded, import_go_proxy, load

__all__ = ("GatewayFile", "Loaded", "TeamFile", "import_go_proxy", "load")
