"""Routers that are trained, and what experts carry for them."""
