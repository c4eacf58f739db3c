"""``python -m hf_compress``: the command of the same name, where its script is not on the path."""

from hf_compress.cli import main

main()
