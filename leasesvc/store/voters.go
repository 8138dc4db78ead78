package store

import "fmt"

// CheckVoters says why a replicated store does not run on n voting members: want 3 or 5.
func CheckVoters(n int) error {
	why := ""
	switch n {
	case 3, 5:
		return nil
	case 1:
		why = "nothing survives the loss of the only one (store type bolt does the same with less)"
	case 2:
		why = "the loss of either one stops both, which is worse than one"
	case 4:
		why = "four survive the loss of one, as three do, and wait for one more"
	default:
		why = "every commit waits for a majority"
	}
	return fmt.Errorf("the number of voting members is %d: want 3 or 5: %s", n, why)
}
