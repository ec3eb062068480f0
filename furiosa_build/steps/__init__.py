"""The steps of a build. Each is a function of a request (plain data and paths) that writes files into a directory.

A step knows nothing of the store, of keys or of other steps: `furiosa_build.build.build` hands it what it needs.
"""
