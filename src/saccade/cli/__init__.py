"""The command line. One file a command: each module here with a function `command` is one, named like the file.

Such a module imports torch and transformers inside its functions only, so that `saccade --help` stays quick.
"""
