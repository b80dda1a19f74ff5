import sys

from sparsek_vllm.build import main

sys.exit(main())
