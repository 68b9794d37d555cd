"""One file for each paper or library; a method's fields are its configuration. What is imported here is public."""

from recombine.core.method import Method, Record, Site, Step, apply, finish, train_only
from recombine.methods.adapters.full_and_probe import Full, LinearProbe
from recombine.methods.adapters.pc_lora import PcLora
from recombine.methods.adapters.peft_library import Peft
from recombine.methods.adapters.rosa import Rosa
from recombine.methods.adapters.ssf import Ssf
from recombine.methods.cersa import Cersa
from recombine.methods.crisp.method import Crisp
from recombine.methods.crisp.recast import Recast
from recombine.methods.jactus.method import Jactus
from recombine.methods.pruning.dgmr import Dgmr
from recombine.methods.pruning.isomorphic import Isomorphic
from recombine.methods.pruning.prunenet import PruneNet
from recombine.methods.pruning.wecolora import WeCoLora
from recombine.methods.svd.balf import Balf
from recombine.methods.svd.dobi import DobiSvd
from recombine.methods.svd.shared import BasisSharing, Dfjr
from recombine.methods.svd.svfit import Svfit
from recombine.methods.svd.svft import Svft
from recombine.methods.svd.truncated import Svd
from recombine.methods.svd.weighted import Asvd, Fwsvd, SvdLlm

__all__ = [name for name, thing in list(vars().items()) if callable(thing) and not name.startswith("_")]
