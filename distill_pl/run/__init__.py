"""Run the stages of an experiment in order (`distill-pl fit`): the run folder, the Trainer, the monitor, the model card."""
