"""The shell, a subclass of IPython's whose module is inside google.colab, as Colab's is."""
from ipykernel.zmqshell import ZMQInteractiveShell


class Shell(ZMQInteractiveShell):
    "What `get_ipython()` returns in the Colab-like kernel."
