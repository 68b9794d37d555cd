"""One file for each paper or library; a method's fields are its configuration. What is imported here is public."""

from recombine.methods.balf import Balf
from recombine.methods.base import Method, Record, Site, Step, apply, finish, train_only
from recombine.methods.baselines import Full, LinearProbe
from recombine.methods.cersa import Cersa
from recombine.methods.crisp import Crisp
from recombine.methods.dgmr import Dgmr
from recombine.methods.dobi_svd import DobiSvd
from recombine.methods.isomorphic import Isomorphic
from recombine.methods.jactus import Jactus
from recombine.methods.pc_lora import PcLora
from recombine.methods.peft import Peft
from recombine.methods.prunenet import PruneNet
from recombine.methods.recast import Recast
from recombine.methods.rosa import Rosa
from recombine.methods.shared_svd import BasisSharing, Dfjr
from recombine.methods.ssf import Ssf
from recombine.methods.svd import Svd
from recombine.methods.svfit import Svfit
from recombine.methods.svft import Svft
from recombine.methods.wecolora import WeCoLora
from recombine.methods.weighted_svd import Asvd, Fwsvd, SvdLlm

__all__ = [name for name, thing in list(vars().items()) if callable(thing) and not name.startswith("_")]
