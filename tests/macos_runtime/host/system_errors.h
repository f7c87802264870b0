// errno: the numbers above 34 are Darwin's own.
#pragma once

namespace macho {

int darwin_error(int linux_error);

}  // namespace macho
