"""The commands of `hashvision`, one per file: its flags, the call, and what it prints.

A command's file has HELP, and may have DESCRIPTION. Its functions are `add_flags(parser)` and
`run(arguments, rest)`, where `rest` holds the words that no flag takes; `run` returns the exit
code, or None for 0. A file imports what it needs only inside `run`, so that `--help` is quick.
"""
