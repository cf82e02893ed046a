"""Other systems, measured the same way. Each runs in a virtual environment of its own
(`harness.environments`).
"""
