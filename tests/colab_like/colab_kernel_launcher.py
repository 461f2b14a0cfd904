"""Starts the Colab-like kernel: google.colab is loaded before the notebook's first cell."""
if __name__ == "__main__":
    from google.colab._kernel import Kernel
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(kernel_class=Kernel)
