"""The configuration: YAML files in, a checked `Loaded` out, or a ConfigError with every mistake.

YAML nodes with their positions, the settings of each kind of file, a reader for each concept (resources, pools, store,
teams, pipelines ...), the JSON Schema, the comparison of two configurations, and the import of the Go proxy's.
"""

from gateway.config.files import GatewayFile, TeamFile
from gateway.config.load import Loaded, import_go_proxy, load

__all__ = ("GatewayFile", "Loaded", "TeamFile", "import_go_proxy", "load")
