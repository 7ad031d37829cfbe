"""DeepSpeed's launcher of the ranks of one machine: the same, but starts sooner.

What is left out of DeepSpeed is in this package's `__init__`.
"""

from deepspeed.launcher.launch import main

if __name__ == "__main__":
    main()
