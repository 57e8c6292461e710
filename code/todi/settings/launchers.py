"""Variables of the launchers that are no settings."""

# What launchers understand besides the settings.
LAUNCHER_VARIABLES = {
    "FAMILY": "the student's family: MODEL_TYPE when not given, and a folder of model_hub/ and outputs/",
    "CKPT_NAME": "the student's name: MODEL_PATH is model_hub/FAMILY/CKPT_NAME when not given",
    "TEACHER_FAMILY": "family of the teacher; FAMILY when not given",
    "TEACHER_NAME": "the teacher's name: TEACHER_MODEL_PATH is the best of its newest SFT run when not given",
    "TEACHER_PEFT": "lora: the teacher is model_hub/TEACHER_FAMILY/TEACHER_NAME with the adapter of its newest SFT run",
    "SKEW_LAMBDA": "0.1 is short for KD_PARAMS=skew_lambda=0.1",
    "GPUS": "devices to use, 0,1 or cpu; all that are visible when not given",
    "NPROC": "processes; one for each device when not given, on a CPU one",
    "NNODES": "nodes; with NODE_RANK, MASTER_ADDR and MASTER_PORT, as in torchrun",
    "RENDEZVOUS_TIMEOUT": "seconds that a node waits for the others before it gives up; 900 when not given",
    "RENDEZVOUS_ID": "a name that all nodes of a job have and no other job: nodes of two jobs are not mixed",
    "NODE_RANK": "number of this node, from 0",
    "MASTER_ADDR": "name of the first node",
    "MASTER_PORT": "a free port there; 29500 when not given",
    "SSH": "the command by which scripts/hostfile.sh reaches a host; ssh, which asks for no password, when not given",
    "MAX_RESTARTS": "how often a training that breaks off goes on from its last state by itself; 0 when not given",
    "HANG_TIMEOUT": "seconds without progress after which a process is taken to hang: its stacks are logged and the "
                    "job ends; 1800 when not given, 0 for never",
    "DRY_RUN": "1: print the command and stop",
    "DOCTOR": "1: check all input, estimate memory and disk space, and stop",
}
