"""The stages. Each module has one frozen `Config` at its top and one public `run(config)`; stages meet only in
files.
"""
