"""The towers in torch, apart from the families so that a family needs no torch to plan."""
