"""Commands in this process."""

from tests.cli.conftest import hmoe_here

__all__ = ["hmoe_here"]
