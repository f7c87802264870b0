// Stands in for MLX's header of this name: its logger is an object in the constant address space,
// which only Metal's compiler can construct. No kernel of the oracle logs.

#pragma once
