"""The kernel that runs the shell."""
from google.colab._shell import Shell
from ipykernel.ipkernel import IPythonKernel
from traitlets import Type


class Kernel(IPythonKernel):
    "IPython's kernel with that shell."

    shell_class = Type(Shell)
