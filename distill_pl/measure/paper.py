"""The paper's published figures, which reports print beside measured ones. Accuracies in percent, parameters in millions."""

import math
from statistics import mean

TABLE_1 = ("softmax", "mlstm", "gla", "hgrn2", "retnet", "mamba2", "metala", "delta_net", "rebased", "hedgehog")  # mixers
STAGES = ("matrix_mixing", "hidden_align", "kd")  # in order; the keys of distill_pl.stages.STAGES, which needs Lightning

# column of the paper's tables -> the lm-eval tasks it averages
COLUMNS = {
    "Lamb.": ("lambada_openai", "lambada_standard"),
    "WinoG.": ("winogrande",),
    "Arc-E": ("arc_easy",),
    "Arc-C": ("arc_challenge",),
    "PIQA": ("piqa",),
    "HellaS.": ("hellaswag",),
}
CHANCE = {"Lamb.": 0.0, "WinoG.": 0.5, "Arc-E": 0.25, "Arc-C": 0.25, "PIQA": 0.5, "HellaS.": 0.25}  # accuracy of guessing
TASKS = tuple(task for tasks in COLUMNS.values() for task in tasks)

# accuracies: one for each of COLUMNS, then their average
TEACHER = (49.26, 59.35, 70.24, 36.65, 71.65, 43.11, 55.04)  # SmolLM-360M
# experiment (file name in experiments/ without .yaml) -> accuracies
TABLE_2 = {
    "softmax": (34.60, 52.57, 65.40, 29.69, 71.27, 38.13, 48.61),
    "softmax_mm": (37.21, 55.41, 67.63, 29.44, 70.89, 39.29, 49.98),
    "mlstm": (31.81, 52.25, 64.86, 27.13, 70.40, 37.72, 47.36),
    "mlstm_mm": (33.74, 54.62, 63.76, 26.96, 70.35, 38.30, 47.95),
    "gla": (31.95, 52.41, 65.15, 29.01, 70.57, 38.02, 47.85),
    "gla_mm": (32.31, 52.01, 65.53, 29.18, 70.13, 37.56, 47.78),
    "hgrn2": (30.14, 53.39, 64.27, 29.01, 70.46, 37.61, 47.48),
    "hgrn2_mm": (29.70, 53.04, 63.68, 27.90, 70.35, 37.02, 46.95),
    "retnet": (32.30, 53.20, 63.43, 28.07, 69.86, 37.50, 47.39),
    "retnet_mm": (31.82, 53.12, 64.18, 26.62, 70.40, 37.50, 47.27),
    "mamba2": (27.72, 52.96, 65.03, 29.52, 70.08, 37.31, 47.10),
    "mamba2_mm": (28.81, 49.96, 64.23, 27.05, 69.91, 37.05, 46.16),
    "metala": (22.02, 52.33, 62.33, 26.54, 69.97, 35.71, 44.82),
    "metala_mm": (29.12, 54.06, 64.23, 27.47, 69.86, 37.07, 46.97),
    "delta_net": (20.86, 51.70, 60.90, 25.43, 68.66, 35.28, 43.80),
    "delta_net_mm": (18.18, 50.99, 60.44, 24.91, 68.12, 34.94, 42.93),
    "rebased": (24.68, 51.38, 58.12, 24.15, 68.12, 33.88, 43.39),
    "rebased_mm": (25.09, 50.51, 57.15, 23.21, 68.12, 33.70, 42.96),
    "hedgehog": (17.69, 51.54, 57.70, 23.29, 66.92, 32.93, 41.69),
    "hedgehog_mm": (20.82, 51.62, 58.12, 24.66, 68.01, 33.60, 42.80),
}
TABLE_3 = {
    "gla": TABLE_2["gla"],
    "gla_mm": TABLE_2["gla_mm"],
    "gla_qkv": (33.10, 54.46, 65.11, 29.69, 70.95, 38.70, 48.66),
    "gla_qkv_mm": (32.15, 54.70, 64.52, 27.39, 70.35, 38.10, 47.87),
    "gla_mm_h2h": (6.90, 53.75, 43.35, 18.00, 61.75, 28.07, 35.30),
    "gla_qkv_h2h": (34.13, 54.14, 63.85, 27.30, 70.51, 38.20, 48.02),
    "gla_qkv_mm_h2h": (34.20, 55.17, 63.85, 28.67, 71.00, 38.62, 48.58),
    "mlstm": TABLE_2["mlstm"],
    "mlstm_mm": TABLE_2["mlstm_mm"],
    "mlstm_qkv": (33.72, 53.91, 66.50, 30.46, 71.06, 38.49, 49.02),
    "mlstm_qkv_mm": (34.13, 55.17, 66.40, 29.01, 70.62, 38.54, 48.98),
    "mlstm_mm_h2h": (33.75, 54.78, 66.37, 29.52, 70.51, 38.78, 48.95),
    "mlstm_qkv_h2h": (34.58, 55.09, 62.84, 26.62, 69.86, 37.79, 47.78),
    "mlstm_qkv_mm_h2h": (35.04, 54.93, 66.84, 30.20, 71.17, 38.33, 49.41),
}
APPENDIX_B = {
    "scratch_mamba2": (4.66, 49.49, 36.74, 19.20, 61.81, 28.11, None),  # printed without an average
    "scratch_mlstm": (10.36, 51.38, 36.70, 20.05, 61.81, 20.07, 33.39),
    "mlstm_plain": (22.09, 53.20, 52.03, 25.09, 67.95, 35.36, 42.62),
    "mlstm_qkv_mm": TABLE_3["mlstm_qkv_mm"],
    "mlstm_qkv_mm_mse": (33.76, 55.41, 65.43, 29.35, 70.24, 38.55, 48.79),
}
APPENDIX_A = dict(zip(TABLE_1, (350, 448, 420, 409, 566, 523, 448, 449, 404, 404), strict=True))


def columns(results: dict[str, dict]) -> dict[str, tuple[float, float]]:
    """Average lm-eval results, by task, into the paper's columns -> accuracy and its standard error, both fractions of 1.

    A column is left out unless `results` has all of its tasks; `Avg.` needs all six columns.
    """
    accuracies = {}
    for column, tasks in COLUMNS.items():
        if all(task in results for task in tasks):
            rows = [results[task] for task in tasks]
            error = math.hypot(*(row["acc_stderr"] for row in rows)) / len(rows)
            accuracies[column] = mean([row["acc"] for row in rows]), error
    if len(accuracies) == len(COLUMNS):
        values, errors = zip(*accuracies.values(), strict=True)
        accuracies["Avg."] = mean(values), math.hypot(*errors) / len(errors)
    return accuracies
