"""Recurrent layers, and their loops on a mesh."""
