from rig_fixtures import rig, stand_in

__all__ = ["rig", "stand_in"]
