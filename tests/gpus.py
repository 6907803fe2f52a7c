"""GPUs as the planners know them; clusters of sm_90 as an H100's driver gave them, of the others an estimate."""

from flute.kernels import plan

GPUS = {
    "A100": plan.Gpu(108, 166912, "sm_80", ((1, 108), (2, 54), (3, 36), (4, 27), (8, 13))),
    "RTX 3090": plan.Gpu(82, 101376, "sm_86", ((1, 82), (2, 41), (3, 27), (4, 20), (8, 10))),
    "L40S": plan.Gpu(142, 101376, "sm_89", ((1, 142), (2, 71), (3, 47), (4, 35), (8, 17))),
    "H100": plan.Gpu(132, 232448, "sm_90", ((1, 132), (2, 66), (3, 39), (4, 30), (8, 15))),
    "RTX 5090": plan.Gpu(170, 101376, "sm_120", ((1, 170), (2, 85), (3, 56), (4, 40), (8, 20))),
}
