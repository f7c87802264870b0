// Keeps and calls blocks.
#pragma once

namespace macho {

void* copy_block(void* block);
void release_block(void* block);
void call_block(void* block, void* argument);

}  // namespace macho
