"""What each video language model of transformers needs to be handed a compressed video: one small file per host.

A host is a class with @register under its config.model_type, in a file of that name; `host_of` finds it. See Host for
what a new one defines: where the videos of a batch stand in the prompt, the model's own encoder over some frames, and
the tokens and features that stand for what is left. Everything else is in pyvidx.hosts.compress, once for all. Its test
is a tiny random model in tests/hosts/tiny_<model_type>.py, which every test of test_compress.py then takes.
"""

from pyvidx.hosts.language.host import Host, Place, Slots
from pyvidx.hosts.language.registry import host_of, names, register
from pyvidx.hosts.language.tokens import Prompt

__all__ = ["Host", "Place", "Prompt", "Slots", "host_of", "names", "register"]
