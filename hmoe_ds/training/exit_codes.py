"""What the exit code of a rank, and of `hmoe pretrain`, says about what to do next. Others are those of crashes."""

DONE = 0
FAILED = 1  # start it again: it goes on from its last checkpoint
USAGE = 2  # mend the request: started again it ends the same way
DIVERGED = 3  # the training itself went wrong: started again it ends the same way
REQUEUE = 85  # it was asked to stop and has saved where it is: start it again when there is room
HUNG = 86  # a rank hung: start it again
