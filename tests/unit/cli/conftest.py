from manager.conftest import config, runtime

__all__ = ["config", "runtime"]
