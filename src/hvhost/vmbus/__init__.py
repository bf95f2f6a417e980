"""Version negotiation, offers, GPADLs, rings, channels."""
