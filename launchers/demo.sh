#!/usr/bin/env bash
# The whole way, small: molecules -> dataset -> 2-rank pretraining -> report, exported model -> embeddings.
# Everything is written to ./demo (or the folder given as the first argument).
set -euo pipefail

out=${1:-demo}
mkdir -p "$out"
# Two ranks on CPU; on GPUs one rank each, two at most.
ranks=$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')

cat > "$out/molecules.smi" <<'EOF'
CC(=O)Oc1ccccc1C(=O)O aspirin
CC(C)Cc1ccc(cc1)C(C)C(=O)O ibuprofen
CN1C=NC2=C1C(=O)N(C(=O)N2C)C caffeine
CC(=O)Nc1ccc(O)cc1 paracetamol
CN(C)C(=N)NC(=N)N metformin
CC1(C)SC2C(NC(=O)Cc3ccccc3)C(=O)N2C1C(=O)O penicillin-G
CN1CCC23C4C1CC5=C2C(=C(C=C5)O)OC3C(C=C4)O morphine
OC(=O)c1ccccc1O salicylic-acid
CC12CCC3C(CCC4=CC(=O)CCC34C)C1CCC2O testosterone
Clc1ccc(cc1)C(c1ccccc1)N1CCN(CC1)CCOCC(=O)O cetirizine
EOF

hmoe prepare nci5k --out "$out/dataset"
hmoe pretrain --config tiny_cpu --num_ranks "$ranks" --parallel.ep_size "$ranks" \
  --data.path "$out/dataset" --run.out "$out/run" --run.steps 300
hmoe report "$out/run" --out "$out/report.html"
hmoe export "$out/run" "$out/model"
hmoe embed "$out/model" "$out/molecules.smi" --out "$out/embeddings.parquet"

cat <<EOF

Done. Everything lies in $out:
  $out/dataset             prepared molecules    (look: hmoe inspect $out/dataset)
  $out/run                 metrics.jsonl, checkpoints, mlflow.db
  $out/report.html         the run in pictures   (open it in a browser)
  $out/model               exported model        (load: HMoEModel.from_pretrained("$out/model"))
  $out/embeddings.parquet  10 embedded molecules
EOF
